"""Where bytes lie: folders and S3 prefixes, read, listed and written under one roof."""
