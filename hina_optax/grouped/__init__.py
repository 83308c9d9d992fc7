"""The one loop over leaves: leaves that are alike in one array, group after group."""
