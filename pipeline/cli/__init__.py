"""The command line: parse what a user types, call one function, print its result."""
