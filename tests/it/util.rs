//! Scratch directories, the vdtool command, what a test requires.
