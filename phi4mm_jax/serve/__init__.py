"""The OpenAI API over one engine, and a page to try it: needs the extra `serve`."""
