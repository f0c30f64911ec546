"""The programs: each file runs by its path, or as ds_classifier.launch.NAME where installed."""
