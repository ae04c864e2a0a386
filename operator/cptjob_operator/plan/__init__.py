"""What a job needs now, decided from values: rules, and what they look at. No I/O."""
