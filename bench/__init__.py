"""Measurements of DistroML beside a peer, in the same run on the same machine: ``python -m bench NAME``.

Machines drift, so nothing here asserts an absolute time: each row is a ratio to something that ran in between our
own runs. ``table`` holds rows and their JSON; ``processes`` starts and ends what is measured; ``ours`` and
``torchrun`` are the two sides of a training run, ``torchrun_ddp`` the peer's script; ``starts`` and ``spine`` are
the measurements. ``heartbeats`` and ``barrier`` measure the control plane: ``control_plane`` starts a real leader
(``leader_process``) and simulated agents (``agents_process``), which take orders (``players``).
"""
