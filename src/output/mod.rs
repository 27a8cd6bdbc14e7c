//! What users read: human or JSON, colour or not.
