"""What is kept of the past: growing keys and values with page summaries."""
