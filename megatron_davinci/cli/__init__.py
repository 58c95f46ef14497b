"""The `davinci` command: wires the rooms together."""
