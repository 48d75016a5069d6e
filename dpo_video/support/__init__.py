"""Files, hashes, random generators, statistics and other helpers that know nothing of videos."""
