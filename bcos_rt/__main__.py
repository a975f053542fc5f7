"""``python -m bcos_rt``: the same as the ``bcos-rt`` command."""

from bcos_rt.cli import main

if __name__ == "__main__":
    main()
