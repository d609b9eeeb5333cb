"""Folders and S3 prefixes behind one interface: listed, read and written."""
