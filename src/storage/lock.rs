//! Advisory locks, compatible with those QEMU takes.
