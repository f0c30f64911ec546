"""Files, URLs, text, progress and keyed random numbers; nothing here knows about training."""
