"""`python -m hsa_compile` is `hsa-compile`."""

from hsa_compile.cli.main import main

main()
