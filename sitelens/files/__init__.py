"""Files and folders that processes share, written whole or not at all, and text made safe for them."""
