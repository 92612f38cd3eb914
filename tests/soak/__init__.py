"""Random fault schedules against real jobs on real nodes: the bits at the end must be those of an undisturbed run."""
