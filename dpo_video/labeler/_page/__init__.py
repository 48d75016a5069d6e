"""The labelling page: its session, sprite sheets and server."""
