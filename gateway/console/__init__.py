"""The console: a page at ``/console`` for trying the gateway out and for seeing what it decides; docs/console.md."""
