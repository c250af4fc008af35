"""Methods by name: communities in, bucket maps out."""
