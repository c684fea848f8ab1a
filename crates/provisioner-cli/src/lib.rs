//! The shared bootstrap of the commands.
