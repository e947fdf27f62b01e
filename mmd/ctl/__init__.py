"""mmdctl, the command line of mmd: a client of the gateway's admin socket, and a front to systemctl and journalctl."""
