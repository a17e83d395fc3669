"""The judge: a frozen oracle, its certificate, and the scoring of anybody's clips."""
