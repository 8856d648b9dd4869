//! The side port: metrics, and what an operator looks at.
