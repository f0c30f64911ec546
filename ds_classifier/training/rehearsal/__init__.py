"""The rehearsals that are done instead of training: --preflight, --dry_run, --overfit_batch."""
