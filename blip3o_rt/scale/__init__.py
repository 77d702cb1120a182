"""More than one machine, or more rows than a call: batches of millions of prompts, and the service on Ray."""
