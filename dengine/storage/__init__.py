"""What is on disk. The only importer of lmdb."""
