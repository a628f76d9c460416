"""A folder for `sys.path`: in a process that starts anew it gives SMP's name to segkit's tree."""
