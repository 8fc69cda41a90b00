"""Files and command lines that nobody would write, made by the thousand: whatever is in them, what
reads them succeeds or raises UserError, in bounded time and memory.

`python -m tests.fuzz config|plan|metadata|safetensors --minutes 10` tries until the time is up.
"""
