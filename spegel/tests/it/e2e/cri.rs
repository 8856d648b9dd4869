//! The kubelet's way to pull: `ImageService.PullImage` over containerd's socket.

use std::path::Path;
use std::time::{Duration, Instant};

use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::{ImageSpec, PullImageRequest};
use tonic::transport::Channel;

/// Longer than any pull of a test takes.
const LIMIT: Duration = Duration::from_secs(300);

/// How long a containerd that answers `ctr` may take to open its CRI.
const OPENING: Duration = Duration::from_secs(20);

/// Pulls for this machine's platform.
pub(super) fn pull(socket: &Path, reference: &str) -> Result<(), String> {
    pull_unless(socket, reference, std::future::pending())
}

/// Pulls for this machine's platform, and takes the pull back when `cancelled` is ready.
pub(super) fn pull_unless(socket: &Path, reference: &str, cancelled: impl Future<Output = ()>) -> Result<(), String> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())?;
    let pull = async {
        let image = ImageSpec { image: reference.to_owned(), ..ImageSpec::default() };
        let request = PullImageRequest { image: Some(image), ..PullImageRequest::default() };
        let mut client = connect(socket).await?;
        let opened_by = Instant::now() + OPENING;
        loop {
            match tokio::time::timeout(LIMIT, client.pull_image(request.clone())).await {
                Err(_) => return Err(format!("no answer to PullImage of {reference} within {LIMIT:?}")),
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(status)) if status.message().contains("not initialized") && Instant::now() < opened_by => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Ok(Err(status)) => return Err(format!("PullImage of {reference}: {status}")),
            }
        }
    };
    runtime.block_on(async {
        tokio::select! {
            pulled = pull => pulled,
            () = cancelled => Err("cancelled".to_owned()),
        }
    })
}

async fn connect(socket: &Path) -> Result<ImageServiceClient<Channel>, String> {
    let channel = containerd_client::connect(socket).await;
    channel.map(ImageServiceClient::new).map_err(|error| format!("containerd's socket: {error}"))
}
