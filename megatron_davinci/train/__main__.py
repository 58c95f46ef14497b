"""`torchrun -m megatron_davinci.train CONFIG.yaml key=value ...`: the command that each rank runs.

An entry point, not part of the room: it stands here for its name, and wires the rooms as `cli` does.
"""

from megatron_davinci.train.signals import WATCH

if __name__ == "__main__":
    # Before all that takes time to import.
    WATCH.install()
    from megatron_davinci.cli.train import main

    main()
