"""The data path: one endpoint for all models. Imports values only; the daemon wires it to the listener and the core."""
