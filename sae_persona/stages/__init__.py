"""One function a stage over a run folder: read what earlier ones left there, add what this one makes."""
