"""Load on a server of OpenAI's images API: what its clients see, and what one call would have taken."""
