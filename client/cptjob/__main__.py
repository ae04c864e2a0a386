"""`python -m cptjob` is the same as `cptjob`."""

from cptjob.cli import main

main()
