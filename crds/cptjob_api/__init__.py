"""The CPTJob API as types: the spec, its status, the rules, the loader and what is generated."""
