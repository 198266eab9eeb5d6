"""What only serve.py needs: batching, the API, the page."""
