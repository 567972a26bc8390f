"""What gc2ray does, as functions: `import gc2ray` offers them, and the command line calls them."""
