"""The libvirt provisioner's page and finalization steps in BlockHost's installer."""
