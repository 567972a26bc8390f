"""`python -m gc2ray`: the command line where its script is not on the path, as on a cluster."""

from gc2ray.cli import main

if __name__ == "__main__":
    main()
