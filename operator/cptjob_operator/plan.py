"""Decides what a job needs. Pure: the same job, observation, settings and time give the same plan."""
