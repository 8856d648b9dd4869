/// x
#[derive(Debug)]
pub struct Containerd;
/// x
#[derive(Debug)]
pub struct ContainerdSettings;
