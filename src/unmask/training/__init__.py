"""The machine under every stage: loop, optimizer, schedule, snapshots, and where it all runs."""
