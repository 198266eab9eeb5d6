"""From a source to token files: one prepare.py for each kind of source."""
