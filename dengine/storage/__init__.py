"""What is on disk: the data directory, the log and the state. The only importer of lmdb."""
