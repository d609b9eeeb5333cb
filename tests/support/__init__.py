"""Real parts for tests and the local run: servers, faults, folders."""
