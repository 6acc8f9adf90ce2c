"""The edge around the core: the cycle, the streams between peers, joining and promotion."""
