"""What the scripts share. Imports model.py and configurator.py, and nothing else of ours."""
