"""The loop over leaves: similar leaves are stacked into one array, and updated group by group."""
