"""The API server and the coordinators, as the operator sees and changes them. All I/O is here."""
