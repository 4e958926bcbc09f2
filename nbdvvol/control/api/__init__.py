"""Control's HTTP API: typed routes over named transactions, and the server that lets only the right peers in."""
