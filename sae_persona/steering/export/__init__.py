"""Interventions as files, a module a format."""
