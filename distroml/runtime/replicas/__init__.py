"""The store ``local`` made safe: each file of a checkpoint on the disks of several nodes, whoever wrote it.

``placement`` says (purely) where copies belong, ``wire`` what nodes say about them, ``exchange`` carries that.
``fetching`` brings one verified file to this node; ``keeping`` has others fetch what was written here, before the commit;
``bringing`` gathers a checkpoint for a restore; ``upkeep`` makes up, on the leader, for copies that were lost.
``cluster_store`` shows all of it as one checkpoint store.
"""
